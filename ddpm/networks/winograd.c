// Functions that winograd.py calls: 3x3 convolutions by Winograd's method, group normalisation with swish, and dropout.
// Images are N,H,W,C with C a multiple of 8. They are float32, or bfloat16 if BFLOAT16 is defined. Sums are float32.
//
// A tile has SIDE x SIDE pixels. Neighbouring tiles overlap, but each pixel lies in the inner OUT x OUT pixels of only one tile.
// float32 uses F(4x4, 3x3). bfloat16 uses F(2x2, 3x3), whose transforms amplify rounding less. A plane holds one of the
// PLANES = SIDE x SIDE places of all transformed tiles. A convolution is one matrix product per plane.
//
// The operands of products are arrays of 32-bit elements. An element is a float, or two bfloat16 numbers that follow each other
// along the summed dimension, as the processor's dot product expects them.
//
// With AMX (matrix instructions for bfloat16), convolutions are direct. Nothing is transformed, and a plane holds one of the
// side x side weights of all kernels. `side` is 3, or 1 for 1x1 convolutions and linear layers.

#include <string.h>
#ifdef BFLOAT16
#include <immintrin.h>
#if defined(__AMX_BF16__) && defined(MATRICES)
#define AMX
#endif
#endif

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(32), aligned(4), may_alias));
typedef unsigned uvec __attribute__((vector_size(32), aligned(4), may_alias));
#define ALWAYS static inline __attribute__((always_inline))

#ifdef __AVX512F__
enum { LANES = 16, ROWS = 12 };
#else
enum { LANES = 8, ROWS = 6 };
#endif
enum { PANEL = 2 * LANES }; // columns of a panel. The second operand of a product is stored panel by panel.
typedef float wide __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float element __attribute__((may_alias));

#ifdef BFLOAT16
typedef unsigned short number;
enum { OUT = 2, SIDE = 4, PER = 2 }; // PER: numbers in an element

ALWAYS vec load(const number *p)
{
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}

ALWAYS __m128i rounded(vec value)
{
  return (__m128i)_mm256_cvtneps_pbh((__m256)value);
}

ALWAYS void store(number *p, vec value)
{
  _mm_storeu_si128((__m128i *)p, rounded(value));
}

// Stores 8 elements. Each element pairs a number of `first` with a number of `second`. (In float32, `first` alone is stored.)
ALWAYS void store_pairs(element *p, vec first, vec second)
{
  __m256i low = _mm256_cvtepu16_epi32(rounded(first)), high = _mm256_cvtepu16_epi32(rounded(second));
  _mm256_storeu_si256((__m256i *)p, _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
}

ALWAYS wide multiply_add(const element *a, const element *b, wide sum)
{
  __m512 pair = _mm512_set1_ps(*a);
  return (wide)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)_mm512_loadu_ps(b));
}

// The transforms of F(2x2, 3x3), at the points 0, 1, -1 and infinity (Lavin & Gray 2016, section 4), in this order:
// B^T for inputs, G for kernels, A^T for outputs, A for gradients of outputs, G^T for gradients of kernels.
ALWAYS void transform_input(const vec *d, vec *o)
{
  o[0] = d[0] - d[2];
  o[1] = d[1] + d[2];
  o[2] = d[2] - d[1];
  o[3] = d[1] - d[3];
}

ALWAYS void transform_kernel(const vec *g, vec *o)
{
  vec half = 0.5f * (g[0] + g[2]), middle = 0.5f * g[1];
  o[0] = g[0];
  o[1] = half + middle;
  o[2] = half - middle;
  o[3] = g[2];
}

ALWAYS void transform_output(const vec *m, vec *o)
{
  o[0] = m[0] + m[1] + m[2];
  o[1] = m[1] - m[2] - m[3];
}

ALWAYS void transform_gradient(const vec *d, vec *o)
{
  o[0] = d[0];
  o[1] = d[0] + d[1];
  o[2] = d[0] - d[1];
  o[3] = -d[1];
}

ALWAYS void return_kernel(const vec *u, vec *o)
{
  o[0] = u[0] + 0.5f * (u[1] + u[2]);
  o[1] = 0.5f * (u[1] - u[2]);
  o[2] = 0.5f * (u[1] + u[2]) + u[3];
}
#else
typedef float number __attribute__((may_alias));
enum { OUT = 4, SIDE = 6, PER = 1 };

ALWAYS vec load(const number *p)
{
  return *(const vec *)p;
}

ALWAYS void store(number *p, vec value)
{
  *(vec *)p = value;
}

ALWAYS void store_pairs(element *p, vec first, vec second)
{
  *(vec *)p = first;
}

ALWAYS wide multiply_add(const element *a, const element *b, wide sum)
{
  return sum + *a * *(const wide *)b;
}

// The transforms of F(4x4, 3x3), at the points 0, 1, -1, 2, -2 and infinity (Lavin & Gray 2016, section 4), in this order:
// B^T for inputs, G for kernels, A^T for outputs, A for gradients of outputs, G^T for gradients of kernels.
ALWAYS void transform_input(const vec *d, vec *o)
{
  vec p = d[4] - 4 * d[2], q = d[3] - 4 * d[1], r = d[4] - d[2], s = 2 * (d[3] - d[1]);
  o[0] = 4 * d[0] - 5 * d[2] + d[4];
  o[1] = p + q;
  o[2] = p - q;
  o[3] = r + s;
  o[4] = r - s;
  o[5] = 4 * d[1] - 5 * d[3] + d[5];
}

ALWAYS void transform_kernel(const vec *g, vec *o)
{
  vec p = (g[0] + g[2]) * (-1 / 6.0f), q = g[1] * (-1 / 6.0f);
  vec r = g[0] * (1 / 24.0f) + g[2] * (1 / 6.0f), s = g[1] * (1 / 12.0f);
  o[0] = g[0] * 0.25f;
  o[1] = p + q;
  o[2] = p - q;
  o[3] = r + s;
  o[4] = r - s;
  o[5] = g[2];
}

ALWAYS void transform_output(const vec *m, vec *o)
{
  vec p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4];
  o[0] = m[0] + p + r;
  o[1] = q + 2 * s;
  o[2] = p + 4 * r;
  o[3] = q + 8 * s + m[5];
}

ALWAYS void transform_gradient(const vec *d, vec *o)
{
  vec p = d[0] + d[2], q = d[1] + d[3], r = d[0] + 4 * d[2], s = 2 * d[1] + 8 * d[3];
  o[0] = d[0];
  o[1] = p + q;
  o[2] = p - q;
  o[3] = r + s;
  o[4] = r - s;
  o[5] = d[3];
}

ALWAYS void return_kernel(const vec *u, vec *o)
{
  vec p = (u[1] + u[2]) * (-1 / 6.0f), q = (u[2] - u[1]) * (1 / 6.0f), r = u[3] + u[4], s = u[3] - u[4];
  o[0] = u[0] * 0.25f + p + r * (1 / 24.0f);
  o[1] = q + s * (1 / 12.0f);
  o[2] = p + r * (1 / 6.0f) + u[5];
}
#endif

long lanes(void) { return LANES; }

ALWAYS long smaller(long a, long b) { return a < b ? a : b; }
ALWAYS long panels(long columns) { return (columns + PANEL - 1) / PANEL; }

#ifndef AMX
enum { PLANES = SIDE * SIDE };

// The size of a convolution's images, and how many tiles each image has down and across.
typedef struct {
  long height, width, channels, down, across;
} shape;

ALWAYS shape shape_of(long height, long width, long channels)
{
  return (shape){height, width, channels, (height + OUT - 1) / OUT, (width + OUT - 1) / OUT};
}

// Finds the addresses of the side x side pixels of a tile, which starts `border` pixels above and to the left of its own
// OUT x OUT pixels. Pixels outside the image get a null pointer.
ALWAYS void find_pixels(const number *images, shape s, long tile, int side, int border, const number *pixels[SIDE][SIDE])
{
  long left = OUT * (tile % s.across) - border, top = OUT * (tile / s.across % s.down) - border;
  const number *from = images + tile / s.across / s.down * s.height * s.width * s.channels;
  for (int i = 0; i < side; i++)
    for (int j = 0; j < side; j++) {
      long y = top + i, z = left + j;
      int inside = y >= 0 && y < s.height && z >= 0 && z < s.width;
      pixels[i][j] = inside ? from + (y * s.width + z) * s.channels : 0;
    }
}

// Transforms 8 channels, from channel c on, of the side x side pixels of a tile to SIDE x SIDE places: columns, then rows.
ALWAYS void transformed_tile(const number *pixels[SIDE][SIDE], long c, int side, void (*transform)(const vec *, vec *),
                             vec places[PLANES])
{
  vec half[SIDE][SIDE], column[SIDE], row[SIDE];
  for (int j = 0; j < side; j++) {
    for (int i = 0; i < side; i++)
      column[i] = pixels[i][j] ? load(pixels[i][j] + c) : (vec){0};
    transform(column, row);
    for (int i = 0; i < SIDE; i++)
      half[i][j] = row[i];
  }
  for (int i = 0; i < SIDE; i++)
    transform(half[i], places + SIDE * i);
}

// Sets m to the product of `rows` rows of a and 1 or 2 vectors of columns of b, or adds the product to m if `add`:
// m[i][j] = sum over p < length of a[i * row + p * step] * b[p][j]. A row of b has PANEL columns, a row of m has m_row.
ALWAYS void product(const int rows, const int vectors, const element *a, long row, long step, const element *b, long length,
                    float *m, long m_row, int add)
{
  wide sums[ROWS][2];
#pragma GCC unroll 12
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < vectors; j++)
      sums[i][j] = add ? *(wide *)(m + i * m_row + j * LANES) : (wide){0};
  for (long p = 0; p < length; p++, a += step, b += PANEL) {
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < vectors; j++)
        sums[i][j] = multiply_add(a + i * row, b + j * LANES, sums[i][j]);
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < vectors; j++)
      *(wide *)(m + i * m_row + j * LANES) = sums[i][j];
}

ALWAYS void rows_of_products(const int vectors, const element *a, long row, long step, const element *b, long length, float *m,
                             long m_row, long rows, int add)
{
  for (; rows >= ROWS; a += ROWS * row, m += ROWS * m_row, rows -= ROWS)
    product(ROWS, vectors, a, row, step, b, length, m, m_row, add);
  for (; rows >= 4; a += 4 * row, m += 4 * m_row, rows -= 4)
    product(4, vectors, a, row, step, b, length, m, m_row, add);
  for (; rows > 0; a += row, m += m_row, rows--)
    product(1, vectors, a, row, step, b, length, m, m_row, add);
}

// Computes `product` for any number of rows and for one panel of b, of which only the first `columns` columns are needed.
static void products(const element *a, long row, long step, const element *b, long length, float *m, long m_row, long rows,
                     long columns, int add)
{
  if (columns > LANES)
    rows_of_products(2, a, row, step, b, length, m, m_row, rows, add);
  else
    rows_of_products(1, a, row, step, b, length, m, m_row, rows, add);
}

#endif

ALWAYS float total_of(vec v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

// Transposes an 8 x 8 matrix, given as 8 vectors, in place.
ALWAYS void transpose(vec r[8])
{
  vec s[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + j] = __builtin_shufflevector(s[i + j], s[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[i + j + 2] = __builtin_shufflevector(s[i + j], s[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    s[i] = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    s[i + 4] = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; i++)
    r[i] = s[i];
}

#ifdef AMX
long by_matrices(void) { return 1; }

#ifndef POSITIONS
#define POSITIONS 256 // positions in a block, whose pixels are copied together: a multiple of STEP
#endif
enum { TILE = 16, STEP = 32 }; // rows of an AMX tile, and bfloat16 numbers in each row

// Rounds a number of channels or positions up to a multiple of STEP. The operands have zeros beyond the channels.
ALWAYS long stepped(long summed) { return (summed + STEP - 1) / STEP * STEP; }

// Numbers the positions of all pixels. For 3x3 kernels (`gap` = 1), a zero follows each line of an image, and a line of
// zeros follows each image. So the neighbour of a pixel at (dy, dx) is always dy * (width + 1) + dx positions away.
typedef struct {
  long images, height, width, gap;
} shape;

ALWAYS long positions(shape s) { return s.images * (s.height + s.gap) * (s.width + s.gap); }
ALWAYS long halo(long width, long side) { return side == 1 ? 0 : width + 2; }
ALWAYS long distance(int plane, shape s) { return s.gap ? (plane / 3 - 1) * (s.width + 1) + plane % 3 - 1 : 0; }

// Returns the index of the pixel at a position, or -1 for the zeros between pixels and outside the images.
ALWAYS long pixel(shape s, long position)
{
  if (!s.gap)
    return position < s.images * s.height * s.width ? position : -1;
  long x = position % (s.width + 1), line = position / (s.width + 1), y = line % (s.height + 1), image = line / (s.height + 1);
  return position < 0 || x == s.width || y == s.height || image >= s.images ? -1 : (image * s.height + y) * s.width + x;
}

// Configures this thread's eight tiles, with 16 rows of 64 bytes each. The thread must call _tile_release at the end.
ALWAYS void configure(void)
{
  struct {
    unsigned char palette, start, reserved[14];
    unsigned short bytes[16];
    unsigned char rows[16];
  } tiles = {.palette = 1};
  for (int i = 0; i < 8; i++) {
    tiles.bytes[i] = 64;
    tiles.rows[i] = TILE;
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(tiles)); // GCC 12's own function declares only a part of the memory that it reads
}

// Adds a product to tiles 0 ... 3, which hold 32 x 32 sums: 32 rows of a times 32 columns of b, summed over STEP numbers. The
// rows of a are `row` numbers apart.
ALWAYS void multiply_tiles(const number *a, long row, const element *b)
{
  _tile_loadd(4, a, row * sizeof(number));
  _tile_loadd(5, a + TILE * row, row * sizeof(number));
  _tile_loadd(6, b, PANEL * sizeof(element));
  _tile_loadd(7, b + TILE, PANEL * sizeof(element));
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

ALWAYS void store_tiles(float *sums)
{
  _tile_stored(0, sums, PANEL * sizeof(float));
  _tile_stored(1, sums + TILE, PANEL * sizeof(float));
  _tile_stored(2, sums + TILE * PANEL, PANEL * sizeof(float));
  _tile_stored(3, sums + TILE * PANEL + TILE, PANEL * sizeof(float));
}

ALWAYS void load_tiles(const float *sums)
{
  __asm__ volatile("" ::: "memory");
  _tile_loadd(0, sums, PANEL * sizeof(float));
  _tile_loadd(1, sums + TILE, PANEL * sizeof(float));
  _tile_loadd(2, sums + TILE * PANEL, PANEL * sizeof(float));
  _tile_loadd(3, sums + TILE * PANEL + TILE, PANEL * sizeof(float));
}

// Sets tiles 0 ... 3 to zero. The barrier keeps the compiler from moving stores past later loads of tiles, since the compiler
// does not know which memory these loads read.
ALWAYS void zero_tiles(void)
{
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Returns how many elements a thread needs for a copy of a block of positions and the indices of their pixels. The elements
// fill whole cache lines.
ALWAYS long space_of_block(long width, long c, long side)
{
  return ((POSITIONS + 2 * halo(width, side) + 2 * TILE) * ((stepped(c) + STEP) / PER + 1) + 15) / 16 * 16;
}

long space_to_convolve(long width, long c, long k, long side, long threads) { return threads * space_of_block(width, c, side); }

// Returns the number of elements that kernel_planes writes.
long kernel_elements(long summed, long columns, long side)
{
  return side * side * panels(columns) * stepped(summed) / PER * PANEL;
}

// Copies kernels w, [k][side][side][c], to planes of panels, [side * side][panels][stepped(c) / PER][PANEL] elements. Products
// with the planes sum over c. If `turned`, the kernels are turned by 180 degrees and products sum over k. Turned kernels convolve
// gradients of y to gradients of x.
void kernel_planes(const float *w, element *planes, long c, long k, long side, long turned)
{
  long count = side * side, sums = stepped(turned ? k : c), parts = panels(turned ? c : k);
#pragma omp parallel for schedule(static)
  for (long of_k = 0; of_k < stepped(k); of_k += 8)
    for (long place = 0; place < count; place++)
      for (long of_c = 0; of_c < stepped(c); of_c += 8) {
        long plane = turned ? count - 1 - place : place, sum = turned ? of_k : of_c, column = turned ? of_c : of_k;
        element *to = planes + ((plane * parts + column / PANEL) * sums + sum) / PER * PANEL + column % PANEL;
        vec rows[8];
        for (int i = 0; i < 8; i++)
          rows[i] = of_k < k && of_c < c ? *(const vec *)(w + ((of_k + i) * count + place) * c + of_c) : (vec){0};
        if (!turned)
          transpose(rows);
        for (int i = 0; i < 8; i += PER)
          store_pairs(to + i / PER * PANEL, rows[i], rows[i + 1]);
      }
}

// Convolves x with kernels from kernel_planes and adds a bias of k values and the images `onto`, unless they are null.
// `space` holds space_to_convolve elements.
void convolve(const number *x, const element *kernels, const float *bias, const number *onto, number *y, float *space,
              long images, long height, long width, long c, long k, long side, long threads)
{
  shape s = {images, height, width, side != 1};
  long length = stepped(c), row = length + STEP, around = halo(width, side);
  long each = stepped((positions(s) + threads - 1) / threads);
#pragma omp parallel for schedule(static)
  for (long thread = 0; thread < threads; thread++) {
    number *copied = (number *)(space + thread * space_of_block(width, c, side));
    int *numbers = (int *)(copied + (POSITIONS + 2 * around + 2 * TILE) * row);
    long end = smaller(positions(s), (thread + 1) * each);
    configure();
    for (long start = thread * each; start < end; start += POSITIONS) {
      long count = smaller(POSITIONS, end - start);
      for (long p = 0; p < count + 2 * around; p++) {
        long from = pixel(s, start + p - around);
        number *to = copied + p * row;
        numbers[p] = (int)from;
        if (from >= 0)
          memcpy(to, x + from * c, c * sizeof(number));
        memset(to + (from < 0 ? 0 : c), 0, (from < 0 ? length : length - c) * sizeof(number));
      }
      for (long part = 0; part < panels(k); part++)
        for (long p = 0; p < count; p += 2 * TILE) {
          float m[2 * TILE][PANEL];
          zero_tiles();
          for (long channel = 0; channel < length; channel += STEP)
            for (int plane = 0; plane < side * side; plane++)
              multiply_tiles(copied + (around + p + distance(plane, s)) * row + channel, row,
                             kernels + ((plane * panels(k) + part) * length + channel) / PER * PANEL);
          store_tiles(m[0]);
          for (long i = 0; i < smaller(2 * TILE, count - p); i++) {
            long to = numbers[around + p + i];
            for (long channel = part * PANEL; to >= 0 && channel < smaller(k, (part + 1) * PANEL); channel += 8) {
              vec sum = bias ? *(const vec *)(bias + channel) : (vec){0};
              sum += *(vec *)(m[i] + channel % PANEL);
              if (onto)
                sum += load(onto + to * k + channel);
              store(y + to * k + channel, sum);
            }
          }
        }
    }
    _tile_release();
  }
}

ALWAYS long pairs_in_block(long width, long side) { return POSITIONS / PER + halo(width, side) + TILE; }

long space_for_gradients(long width, long c, long k, long side)
{
  return side * side * panels(k) * PANEL * panels(c) * PANEL + panels(k) * PANEL * (POSITIONS + STEP) / PER +
         2 * pairs_in_block(width, side) * panels(c) * PANEL;
}

// Computes the gradients of kernels, [k][side][side][c], and of the bias from x and the gradients of y. For each plane, the
// gradient of y at each pixel is multiplied by x at the plane's distance, and summed over all pixels. Elements hold pairs of
// pixels, so x is stored twice: in pairs that start at even positions, and in pairs that start at odd positions. `space` holds
// space_for_gradients elements.
void kernel_gradients(const number *x, const number *gradient, float *of_kernels, float *of_bias, float *space, long images,
                      long height, long width, long c, long k, long side)
{
  shape s = {images, height, width, side != 1};
  long count = side * side, around = halo(width, side) + halo(width, side) % 2, row = POSITIONS + STEP, pairs = pairs_in_block(width, side);
  float *total = space;                                                                       // [k][c] in squares of PANEL
  number *turned = (number *)(total + count * panels(k) * PANEL * panels(c) * PANEL);        // [k][positions]
  element *paired = (element *)(turned + panels(k) * PANEL * row);                            // [2][panels][pairs][PANEL]
#pragma omp parallel
  {
    configure();
    for (long start = 0; start < positions(s); start += POSITIONS) {
      long length = stepped(smaller(POSITIONS, positions(s) - start));
#pragma omp for schedule(static) nowait
      for (long p = 0; p < length / PER + around; p++) {
        long from[3];
        for (int i = 0; i < 3; i++)
          from[i] = pixel(s, start + 2 * p + i - around);
        for (long channel = 0; channel < c; channel += 8) {
          vec three[3];
          for (int i = 0; i < 3; i++)
            three[i] = from[i] < 0 ? (vec){0} : load(x + from[i] * c + channel);
          element *to = paired + (channel / PANEL * pairs + p) * PANEL + channel % PANEL;
          store_pairs(to, three[0], three[1]);
          store_pairs(to + panels(c) * pairs * PANEL, three[1], three[2]);
        }
      }
#pragma omp for schedule(static)
      for (long p = 0; p < length; p += 16) {
        long from[16];
        for (int i = 0; i < 16; i++)
          from[i] = pixel(s, start + p + i);
        for (long channel = 0; channel < k; channel += 8) {
          vec rows[8];
          for (int i = 0; i < 8; i++) {
            vec two[2];
            for (int of = 0; of < 2; of++)
              two[of] = from[2 * i + of] < 0 ? (vec){0} : load(gradient + from[2 * i + of] * k + channel);
            store_pairs((element *)(rows + i), two[0], two[1]);
          }
          transpose(rows);
          for (int i = 0; i < 8; i++)
            *(vec *)(turned + (channel + i) * row + p) = rows[i];
        }
      }
#pragma omp for schedule(static) collapse(2)
      for (long of_k = 0; of_k < panels(k); of_k++)
        for (long of_c = 0; of_c < panels(c); of_c++)
          for (int plane = 0; plane < side * side; plane++) {
            float *sums = total + ((of_k * panels(c) + of_c) * count + plane) * PANEL * PANEL;
            long first = around + distance(plane, s);
            const element *b = paired + ((first % 2 * panels(c) + of_c) * pairs + first / 2) * PANEL;
            if (start)
              load_tiles(sums);
            else
              zero_tiles();
            for (long p = 0; p < length; p += STEP)
              multiply_tiles(turned + of_k * PANEL * row + p, row, b + p / PER * PANEL);
            store_tiles(sums);
          }
#pragma omp for schedule(static)
      for (long channel = 0; channel < k; channel++) {
        vec sum = {0};
        for (long p = 0; p < length; p += 8)
          sum += load(turned + channel * row + p);
        of_bias[channel] = (start ? of_bias[channel] : 0) + total_of(sum);
      }
    }
    _tile_release();
#pragma omp for schedule(static)
    for (long channel = 0; channel < k; channel++)
      for (int plane = 0; plane < side * side; plane++)
        for (long of_c = 0; of_c < c; of_c += 8)
          *(vec *)(of_kernels + (channel * count + plane) * c + of_c) = *(vec *)(total + (((channel / PANEL * panels(c) + of_c / PANEL)
             * count + plane) * PANEL + channel % PANEL) * PANEL + of_c % PANEL);
  }
}
#else
long by_matrices(void) { return 0; }

#ifndef BLOCK
#define BLOCK 48   // tiles that each thread transforms at a time, so that they stay in its cache
#define SUMMED 512 // tiles over which gradients of kernels are summed at a time: an even number
#endif

// Returns the number of elements that kernel_planes writes.
long kernel_elements(long summed, long columns, long side) { return PLANES * summed / PER * panels(columns) * PANEL; }

long space_to_convolve(long width, long c, long k, long side, long threads)
{
  return PLANES * BLOCK * threads * (c / PER + 16 + panels(k) * PANEL);
}

long space_for_gradients(long width, long c, long k, long side)
{
  return PLANES * (c * panels(k) * PANEL + SUMMED / PER * (c + 16 + panels(k) * PANEL));
}

// Transforms kernels w, [k][3][3][c], to planes of panels, G w G^T: [PLANES][panels][c / PER][PANEL] elements. Products with
// the planes sum over c. If `turned`, the kernels are turned by 180 degrees and products sum over k. The result then has
// [PLANES][panels][k / PER][PANEL] elements. Turned kernels convolve gradients of y to gradients of x.
void kernel_planes(const float *w, element *planes, long c, long k, long side, long turned)
{
  long sums = turned ? k : c, columns = turned ? c : k, size = sums / PER * PANEL;
#pragma omp parallel for schedule(static) collapse(2)
  for (long part = 0; part < panels(columns); part++)
    for (long sum = 0; sum < sums; sum += 8)
      for (long column = 0; column < PANEL; column += 8) {
        vec kernels[9][8];
        for (int place = 0; place < 9; place++) {
          for (int i = 0; i < 8; i++) {
            long of_k = turned ? sum + i : part * PANEL + column + i, of_c = turned ? part * PANEL + column : sum;
            int inside = of_k < k && of_c < c;
            kernels[place][i] = inside ? *(const vec *)(w + (of_k * 9 + (turned ? 8 - place : place)) * c + of_c) : (vec){0};
          }
          if (!turned)
            transpose(kernels[place]);
        }
        for (int i = 0; i < 8; i += PER) {
          vec places[PER][PLANES];
          for (int of = 0; of < PER; of++) {
            vec half[SIDE][3];
            for (int j = 0; j < 3; j++) {
              vec row[SIDE];
              transform_kernel((vec[]){kernels[j][i + of], kernels[3 + j][i + of], kernels[6 + j][i + of]}, row);
              for (int at = 0; at < SIDE; at++)
                half[at][j] = row[at];
            }
            for (int at = 0; at < SIDE; at++)
              transform_kernel(half[at], places[of] + SIDE * at);
          }
          for (int plane = 0; plane < PLANES; plane++)
            store_pairs(planes + (plane * panels(columns) + part) * size + (sum + i) / PER * PANEL + column, places[0][plane],
                        places[PER - 1][plane]);
        }
      }
}

// Convolves x with kernels from kernel_planes and adds a bias of k values and the images `onto`, unless they are null.
// `space` holds space_to_convolve elements.
void convolve(const number *x, const element *kernels, const float *bias, const number *onto, number *y, float *space,
              long images, long height, long width, long c, long k, long side, long threads)
{
  long block = BLOCK * threads;
  shape in = shape_of(height, width, c);
  long length = c / PER, row = length + 16, m_row = panels(k) * PANEL, tiles = images * in.down * in.across;
  float *m = space + PLANES * block * row;
#pragma omp parallel
  for (long start = 0; start < tiles; start += block) {
    long count = tiles - start < block ? tiles - start : block;
#pragma omp for schedule(static)
    for (long tile = 0; tile < count; tile++) {
      const number *pixels[SIDE][SIDE];
      find_pixels(x, in, start + tile, SIDE, 1, pixels);
      for (long channel = 0; channel < c; channel += 8) {
        vec places[PLANES];
        transformed_tile(pixels, channel, SIDE, transform_input, places);
        for (int plane = 0; plane < PLANES; plane++)
          store((number *)(space + (plane * block + tile) * row) + channel, places[plane]);
      }
    }
#pragma omp for schedule(static) collapse(2)
    for (long plane = 0; plane < PLANES; plane++)
      for (long part = 0; part < panels(k); part++)
        products(space + plane * block * row, row, 1, kernels + (plane * panels(k) + part) * length * PANEL, length,
                 m + plane * block * m_row + part * PANEL, m_row, count, k - part * PANEL, 0);
#pragma omp for schedule(static)
    for (long tile = 0; tile < count; tile++) {
      long left = OUT * ((start + tile) % in.across), top = OUT * ((start + tile) / in.across % in.down);
      long image = (start + tile) / in.across / in.down * height * width * k;
      for (long channel = 0; channel < k; channel += 8) {
        vec half[OUT][SIDE], column[SIDE], pixels[OUT], add = bias ? *(const vec *)(bias + channel) : (vec){0};
        for (int j = 0; j < SIDE; j++) {
          for (int i = 0; i < SIDE; i++)
            column[i] = *(const vec *)(m + ((SIDE * i + j) * block + tile) * m_row + channel);
          transform_output(column, pixels);
          for (int i = 0; i < OUT; i++)
            half[i][j] = pixels[i];
        }
        for (int i = 0; i < OUT && top + i < height; i++) {
          transform_output(half[i], pixels);
          for (int j = 0; j < OUT && left + j < width; j++) {
            long to = image + ((top + i) * width + left + j) * k + channel;
            vec sum = pixels[j] + add;
            if (onto)
              sum += load(onto + to);
            store(y + to, sum);
          }
        }
      }
    }
  }
}

// Computes the gradients of kernels, [k][3][3][c], from the gradients of their planes: G^T total G. A row of a plane belongs to a
// channel of x. All threads must call this function.
ALWAYS void return_kernels(const float *total, float *of_kernels, long c, long k)
{
  long columns = panels(k) * PANEL;
#pragma omp for schedule(static) collapse(2)
  for (long channel = 0; channel < c; channel += 8)
    for (long column = 0; column < k; column += 8) {
      vec kernels[9][8];
      for (int i = 0; i < 8; i++) {
        vec half[3][SIDE], row[3], places[SIDE];
        for (int side = 0; side < SIDE; side++) {
          for (int j = 0; j < SIDE; j++)
            places[j] = *(const vec *)(total + ((SIDE * j + side) * c + channel + i) * columns + column);
          return_kernel(places, row);
          for (int j = 0; j < 3; j++)
            half[j][side] = row[j];
        }
        for (int j = 0; j < 3; j++) {
          return_kernel(half[j], row);
          for (int place = 0; place < 3; place++)
            kernels[3 * j + place][i] = row[place];
        }
      }
      for (int place = 0; place < 9; place++) {
        transpose(kernels[place]);
        for (int i = 0; i < 8; i++)
          *(vec *)(of_kernels + ((column + i) * 9 + place) * c + channel) = kernels[place][i];
      }
    }
}

// Computes the gradients of kernels, [k][3][3][c], and of the bias from x and the gradients g of y. The gradient of kernels is
// G^T u G. Here u is the sum, over all tiles, of the transformed x times A g A^T. `space` holds space_for_gradients elements.
void kernel_gradients(const number *x, const number *gradient, float *of_kernels, float *of_bias, float *space, long images,
                      long height, long width, long c, long k, long side)
{
  const long block = SUMMED;
  shape in = shape_of(height, width, c), out = shape_of(height, width, k);
  long step = c + 16, columns = panels(k) * PANEL, tiles = images * in.down * in.across;
  element *g = space + PLANES * (block / PER) * step;
  float *total = g + PLANES * (block / PER) * columns;
#pragma omp parallel
  {
    for (long start = 0; start < tiles; start += block) {
      long count = tiles - start < block ? tiles - start : block, length = (count + PER - 1) / PER;
#pragma omp for schedule(static)
      for (long p = 0; p < length; p++) {
        const number *of_x[PER][SIDE][SIDE] = {0}, *of_y[PER][SIDE][SIDE] = {0}; // zeros beyond the last tile
        vec places[PER][PLANES];
        for (int of = 0; of < PER && p * PER + of < count; of++) {
          find_pixels(x, in, start + p * PER + of, SIDE, 1, of_x[of]);
          find_pixels(gradient, out, start + p * PER + of, OUT, 0, of_y[of]);
        }
        for (long channel = 0; channel < c; channel += 8) {
          for (int of = 0; of < PER; of++)
            transformed_tile(of_x[of], channel, SIDE, transform_input, places[of]);
          for (int plane = 0; plane < PLANES; plane++)
            store_pairs(space + (plane * (block / PER) + p) * step + channel, places[0][plane], places[PER - 1][plane]);
        }
        for (long channel = 0; channel < k; channel += 8) {
          for (int of = 0; of < PER; of++)
            transformed_tile(of_y[of], channel, OUT, transform_gradient, places[of]);
          for (int plane = 0; plane < PLANES; plane++)
            store_pairs(g + ((plane * panels(k) + channel / PANEL) * (block / PER) + p) * PANEL + channel % PANEL,
                        places[0][plane], places[PER - 1][plane]);
        }
      }
#pragma omp for schedule(static) collapse(2)
      for (long plane = 0; plane < PLANES; plane++)
        for (long part = 0; part < panels(k); part++)
          products(space + plane * (block / PER) * step, 1, step, g + (plane * panels(k) + part) * (block / PER) * PANEL,
                   length, total + plane * c * columns + part * PANEL, columns, c, k - part * PANEL, start > 0);
    }
    return_kernels(total, of_kernels, c, k);
#pragma omp for schedule(static)
    for (long channel = 0; channel < k; channel += 8) {
      vec sum = {0};
      for (long start = 0; start < images * height * width; start += 64) {
        vec part = {0};
        for (long pixel = start; pixel < smaller(start + 64, images * height * width); pixel++)
          part += load(gradient + pixel * k + channel);
        sum += part;
      }
      *(vec *)(of_bias + channel) = sum;
    }
  }
}
#endif

#ifdef BFLOAT16
// Returns 1 / (1 + exp(-x)) with relative error 1e-4. The exponential is 2^n 2^r, with 2^r from a polynomial in r.
ALWAYS vec sigmoid(vec x)
{
  vec power = x * -1.44269504f, n = (vec)_mm256_roundscale_ps((__m256)power, 0), r = power - n;
  vec p = 1.0f + r * (0.693147182f + r * (0.240226507f + r * (0.0555041087f + r * 0.00961812911f)));
  return (vec)_mm256_rcp14_ps((__m256)(1 + (vec)_mm256_scalef_ps((__m256)p, (__m256)n)));
}
#else
// Returns 1 / (1 + exp(-x)) with relative error 3e-7; x is clamped to -88 ... 87. The exponential is 2^n exp(r) with
// r = -x - n ln 2, and exp(r) comes from a polynomial in r.
ALWAYS vec sigmoid(vec x)
{
  vec low = (vec){0} - 87, high = (vec){0} + 88;
  x = -x;
  ivec below = x < low, above = x > high;
  x = (vec)(((ivec)x & ~below) | ((ivec)low & below));
  x = (vec)(((ivec)x & ~above) | ((ivec)high & above));
  vec magic = (vec){0} + 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  vec n = x * 1.44269504f + magic;
  ivec exponent = ((ivec)n - (ivec)magic) << 23;
  n -= magic;
  vec r = x - n * 0.693145752f - n * 1.42860677e-6f; // ln 2 in two parts
  vec p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666671f + r * (0.0416664763f + r * (0.00833337709f + r * 0.00139810308f)))));
  return 1 / (1 + (vec)((ivec)p + exponent));
}
#endif

enum { RUN = 16 }; // pixels that are summed in single precision. Sums of these sums are in double precision.

// Returns 8 values of a shift, or zeros if the shift is null.
ALWAYS vec shift_of(const float *shift, long c) { return shift ? *(const vec *)(shift + c) : (vec){0}; }

// Computes y from x, both [N][P][C]: adds a shift, [N][C] or null, then applies group normalisation and, unless `linear`, swish.
// Stores the mean and the inverse deviation of each group in `moments`, [N][groups][2].
void normalised(const number *x, const float *shift, const float *weight, const float *bias, number *y, float *moments,
                long images, long pixels, long channels, long groups, double eps, long linear)
{
  long size = channels / groups;
#pragma omp parallel for schedule(static)
  for (long image = 0; image < images; image++) {
    const number *from = x + image * pixels * channels;
    number *to = y + image * pixels * channels;
    const float *add = shift ? shift + image * channels : 0;
    double sums[channels], squares[channels];
    float a[channels], b[channels];
    memset(sums, 0, sizeof sums);
    memset(squares, 0, sizeof squares);
    for (long start = 0; start < pixels; start += RUN)
      for (long c = 0; c < channels; c += 8) {
        vec sum = {0}, square = {0};
        for (long pixel = start; pixel < pixels && pixel < start + RUN; pixel++) {
          vec value = load(from + pixel * channels + c) + shift_of(add, c);
          sum += value;
          square += value * value;
        }
        for (int i = 0; i < 8; i++) {
          sums[c + i] += sum[i];
          squares[c + i] += square[i];
        }
      }
    for (long group = 0; group < groups; group++) {
      double sum = 0, square = 0, count = (double)(size * pixels);
      for (long c = group * size; c < (group + 1) * size; c++) {
        sum += sums[c];
        square += squares[c];
      }
      double mean = sum / count, variance = square / count - mean * mean;
      double scale = 1 / __builtin_sqrt((variance > 0 ? variance : 0) + eps);
      moments[2 * (image * groups + group)] = (float)mean;
      moments[2 * (image * groups + group) + 1] = (float)scale;
      for (long c = group * size; c < (group + 1) * size; c++) {
        a[c] = (float)(scale * weight[c]);
        b[c] = (float)(bias[c] - mean * scale * weight[c]);
      }
    }
    for (long pixel = 0; pixel < pixels; pixel++)
      for (long c = 0; c < channels; c += 8) {
        vec value = (load(from + pixel * channels + c) + shift_of(add, c)) * *(vec *)(a + c) + *(vec *)(b + c);
        if (!linear)
          value *= sigmoid(value);
        store(to + pixel * channels + c, value);
      }
  }
}

// Returns the derivative of swish at z, times g. If `linear`, returns g itself.
ALWAYS vec swish_gradient(vec z, vec g, long linear)
{
  if (linear)
    return g;
  vec part = sigmoid(z);
  return g * part * (1 + z * (1 - part));
}

// Computes the gradient of x and, for each image, the gradients of the weights, biases and shift, [N][3][C]. `gradient` is the
// gradient of y. Let xhat be the normalised x, and d the gradient of weight * xhat + bias. The gradient of x is the inverse
// deviation times weight * d - mean(weight * d) - xhat * mean(weight * d * xhat), where means are over the group.
void normalised_gradients(const number *x, const float *shift, const number *gradient, const float *weight, const float *bias,
                          const float *moments, number *of_x, float *of_parameters, long images, long pixels, long channels, long groups, long linear)
{
  long size = channels / groups;
#pragma omp parallel for schedule(static)
  for (long image = 0; image < images; image++) {
    const number *from = x + image * pixels * channels, *g = gradient + image * pixels * channels;
    number *to = of_x + image * pixels * channels;
    float *of_weight = of_parameters + 3 * image * channels, *of_bias = of_weight + channels, *of_shift = of_bias + channels;
    const float *add = shift ? shift + image * channels : 0;
    float mean[channels], scale[channels], level[channels], slope[channels];
    double weights[channels], biases[channels];
    memset(weights, 0, sizeof weights);
    memset(biases, 0, sizeof biases);
    for (long c = 0; c < channels; c++) {
      mean[c] = moments[2 * (image * groups + c / size)];
      scale[c] = moments[2 * (image * groups + c / size) + 1];
    }
    for (long start = 0; start < pixels; start += RUN)
      for (long c = 0; c < channels; c += 8) {
        vec sum = {0}, product = {0}, w = *(const vec *)(weight + c), b = *(const vec *)(bias + c);
        for (long pixel = start; pixel < pixels && pixel < start + RUN; pixel++) {
          vec normal = (load(from + pixel * channels + c) + shift_of(add, c) - *(vec *)(mean + c)) * *(vec *)(scale + c);
          vec d = swish_gradient(normal * w + b, load(g + pixel * channels + c), linear);
          sum += d;
          product += d * normal;
        }
        for (int i = 0; i < 8; i++) {
          biases[c + i] += sum[i];
          weights[c + i] += product[i];
        }
      }
    for (long group = 0; group < groups; group++) {
      double sum = 0, product = 0, count = (double)(size * pixels);
      for (long c = group * size; c < (group + 1) * size; c++) {
        of_weight[c] = (float)weights[c];
        of_bias[c] = (float)biases[c];
        sum += weight[c] * biases[c];
        product += weight[c] * weights[c];
      }
      for (long c = group * size; c < (group + 1) * size; c++) {
        level[c] = (float)(sum / count);
        slope[c] = (float)(product / count);
      }
    }
    memset(of_shift, 0, channels * sizeof(float));
    for (long start = 0; start < pixels; start += RUN)
      for (long c = 0; c < channels; c += 8) {
        vec w = *(const vec *)(weight + c), b = *(const vec *)(bias + c), inverse = *(vec *)(scale + c), sum = {0};
        for (long pixel = start; pixel < pixels && pixel < start + RUN; pixel++) {
          vec normal = (load(from + pixel * channels + c) + shift_of(add, c) - *(vec *)(mean + c)) * inverse;
          vec d = swish_gradient(normal * w + b, load(g + pixel * channels + c), linear);
          vec found = inverse * (w * d - *(vec *)(level + c) - normal * *(vec *)(slope + c));
          store(to + pixel * channels + c, found);
          sum += found;
        }
        *(vec *)(of_shift + c) += sum;
      }
  }
}

// Mixes the bits of 8 numbers, so that the results for consecutive numbers look random.
ALWAYS uvec mixed(uvec x)
{
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Applies dropout: each number of y is 0 with probability `rate`, and otherwise the number of x divided by 1 - rate. Whether
// number i is kept depends only on first + i and the seed. So a second call applies the same mask to gradients.
void dropped(const number *x, number *y, long count, long first, long seed, double rate)
{
  unsigned least = (unsigned)(rate * 4294967296.0), low = (unsigned)seed, high = (unsigned)(seed >> 32);
  float factor = (float)(1 / (1 - rate));
#pragma omp parallel for schedule(static)
  for (long start = 0; start < count; start += 8) {
    uvec index = (unsigned)(first + start) + (uvec){0, 1, 2, 3, 4, 5, 6, 7};
    ivec kept = mixed(mixed(index + low) + high) >= least;
    store(y + start, (vec)((ivec)(load(x + start) * factor) & kept));
  }
}
