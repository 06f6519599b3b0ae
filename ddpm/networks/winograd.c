// Functions that winograd.py calls: Winograd's transforms, and group normalisation with swish. Images are float32 N,H,W,C with
// C a multiple of 8. A tile is 6x6 pixels; tiles overlap, and only the inner 4x4 pixels belong to one tile.
//
// Transformed tiles are stored as 36 planes of rows x channels with one tile per row, the operands of 36 matrix products.

#include <string.h>

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(32), aligned(4), may_alias));

#define LOAD(p) (*(const vec *)(p))
#define STORE(p, value) (*(vec *)(p) = (value))

// B^T, A^T, A and B of F(4x4, 3x3), at the points 0, 1, -1, 2, -2 and infinity: Lavin & Gray 2016, section 4.
static inline void transform_input(const vec *d, vec *o)
{
  vec p = d[4] - 4 * d[2], q = d[3] - 4 * d[1], r = d[4] - d[2], s = 2 * (d[3] - d[1]);
  o[0] = 4 * d[0] - 5 * d[2] + d[4];
  o[1] = p + q;
  o[2] = p - q;
  o[3] = r + s;
  o[4] = r - s;
  o[5] = 4 * d[1] - 5 * d[3] + d[5];
}

static inline void transform_output(const vec *m, vec *o)
{
  vec p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4];
  o[0] = m[0] + p + r;
  o[1] = q + 2 * s;
  o[2] = p + 4 * r;
  o[3] = q + 8 * s + m[5];
}

static inline void transform_gradient(const vec *d, vec *o)
{
  vec p = d[0] + d[2], q = d[1] + d[3], r = d[0] + 4 * d[2], s = 2 * d[1] + 8 * d[3];
  o[0] = d[0];
  o[1] = p + q;
  o[2] = p - q;
  o[3] = r + s;
  o[4] = r - s;
  o[5] = d[3];
}

static inline void return_input(const vec *m, vec *o)
{
  vec p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4];
  o[0] = 4 * m[0];
  o[1] = 4 * (m[5] - q) - 2 * s;
  o[2] = -5 * m[0] - 4 * p - r;
  o[3] = q + 2 * s - 5 * m[5];
  o[4] = m[0] + p + r;
  o[5] = m[5];
}

// Transforms x, N,H,W,C, to planes: B^T d B of each tile d, with zeros around the image.
void input_planes(const float *x, float *planes, long images, long height, long width, long channels,
                  long rows)
{
  long down = (height + 3) / 4, across = (width + 3) / 4;
#pragma omp parallel for schedule(static)
  for (long tile = 0; tile < images * down * across; tile++) {
    long left = 4 * (tile % across) - 1, top = 4 * (tile / across % down) - 1;
    const float *from = x + tile / across / down * height * width * channels;
    for (long c = 0; c < channels; c += 8) {
      vec half[6][6], column[6], row[6];
      for (int j = 0; j < 6; j++) {
        for (int i = 0; i < 6; i++) {
          long y = top + i, z = left + j;
          int inside = y >= 0 && y < height && z >= 0 && z < width;
          column[i] = inside ? LOAD(from + (y * width + z) * channels + c) : (vec){0};
        }
        transform_input(column, row);
        for (int i = 0; i < 6; i++)
          half[i][j] = row[i];
      }
      for (int i = 0; i < 6; i++) {
        transform_input(half[i], row);
        for (int j = 0; j < 6; j++)
          STORE(planes + ((6 * i + j) * rows + tile) * channels + c, row[j]);
      }
    }
  }
}

// Transforms planes to y, N,H,W,C: A^T m A of each tile m, plus a bias of C values unless it is null.
void output_images(const float *planes, const float *bias, float *y, long images, long height, long width, long channels,
                  long rows)
{
  long down = (height + 3) / 4, across = (width + 3) / 4;
#pragma omp parallel for schedule(static)
  for (long tile = 0; tile < images * down * across; tile++) {
    long left = 4 * (tile % across), top = 4 * (tile / across % down);
    float *to = y + tile / across / down * height * width * channels;
    for (long c = 0; c < channels; c += 8) {
      vec half[4][6], column[6], row[4], add = bias ? LOAD(bias + c) : (vec){0};
      for (int j = 0; j < 6; j++) {
        for (int i = 0; i < 6; i++)
          column[i] = LOAD(planes + ((6 * i + j) * rows + tile) * channels + c);
        transform_output(column, row);
        for (int i = 0; i < 4; i++)
          half[i][j] = row[i];
      }
      for (int i = 0; i < 4 && top + i < height; i++) {
        transform_output(half[i], row);
        for (int j = 0; j < 4 && left + j < width; j++)
          STORE(to + ((top + i) * width + left + j) * channels + c, row[j] + add);
      }
    }
  }
}

// Transforms gradients of y, N,H,W,C, to planes: A g A^T of the 4x4 pixels g of each tile, with zeros beyond the image.
void gradient_planes(const float *y, float *planes, long images, long height, long width, long channels,
                  long rows)
{
  long down = (height + 3) / 4, across = (width + 3) / 4;
#pragma omp parallel for schedule(static)
  for (long tile = 0; tile < images * down * across; tile++) {
    long left = 4 * (tile % across), top = 4 * (tile / across % down);
    const float *from = y + tile / across / down * height * width * channels;
    for (long c = 0; c < channels; c += 8) {
      vec half[6][4], column[4], row[6];
      for (int j = 0; j < 4; j++) {
        for (int i = 0; i < 4; i++) {
          int inside = top + i < height && left + j < width;
          column[i] = inside ? LOAD(from + ((top + i) * width + left + j) * channels + c) : (vec){0};
        }
        transform_gradient(column, row);
        for (int i = 0; i < 6; i++)
          half[i][j] = row[i];
      }
      for (int i = 0; i < 6; i++) {
        transform_gradient(half[i], row);
        for (int j = 0; j < 6; j++)
          STORE(planes + ((6 * i + j) * rows + tile) * channels + c, row[j]);
      }
    }
  }
}

// Transforms planes to gradients of x, N,H,W,C: the sum of B m B^T over the tiles m, which overlap.
void input_gradients(const float *planes, float *x, long images, long height, long width, long channels,
                  long rows)
{
  long down = (height + 3) / 4, across = (width + 3) / 4;
#pragma omp parallel for schedule(static)
  for (long image = 0; image < images; image++) {
    float *to = x + image * height * width * channels;
    memset(to, 0, (size_t)(height * width * channels) * sizeof *to);
    for (long place = 0; place < down * across; place++) {
      long tile = image * down * across + place, left = 4 * (place % across) - 1, top = 4 * (place / across) - 1;
      for (long c = 0; c < channels; c += 8) {
        vec half[6][6], column[6], row[6];
        for (int j = 0; j < 6; j++) {
          for (int i = 0; i < 6; i++)
            column[i] = LOAD(planes + ((6 * i + j) * rows + tile) * channels + c);
          return_input(column, row);
          for (int i = 0; i < 6; i++)
            half[i][j] = row[i];
        }
        for (int i = 0; i < 6; i++) {
          if (top + i < 0 || top + i >= height)
            continue;
          return_input(half[i], row);
          for (int j = 0; j < 6; j++)
            if (left + j >= 0 && left + j < width) {
              float *pixel = to + ((top + i) * width + left + j) * channels + c;
              STORE(pixel, LOAD(pixel) + row[j]);
            }
        }
      }
    }
  }
}

// exp(x) with relative error 2e-7; x is clamped to -87 ... 88. Computed as 2^n exp(r), r = x - n ln 2, by a polynomial in r.
static inline vec exponential(vec x)
{
  vec low = (vec){0} - 87, high = (vec){0} + 88;
  ivec below = x < low, above = x > high;
  x = (vec)(((ivec)x & ~below) | ((ivec)low & below));
  x = (vec)(((ivec)x & ~above) | ((ivec)high & above));
  vec magic = (vec){0} + 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  vec n = x * 1.44269504f + magic;
  ivec exponent = ((ivec)n - (ivec)magic) << 23;
  n -= magic;
  vec r = x - n * 0.693145752f - n * 1.42860677e-6f; // ln 2 in two parts
  vec p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666671f + r * (0.0416664763f + r * (0.00833337709f + r * 0.00139810308f)))));
  return (vec)((ivec)p + exponent);
}

// Computes y, like x of shape N,P,C: swish of the group-normalised x. Means and variances use sums in double precision.
void normalised_swish(const float *x, const float *weight, const float *bias, float *y, long images, long pixels,
                      long channels, long groups, double eps)
{
  long size = channels / groups;
#pragma omp parallel for schedule(static)
  for (long image = 0; image < images; image++) {
    const float *from = x + image * pixels * channels;
    float *to = y + image * pixels * channels;
    double sums[channels], squares[channels];
    float a[channels], b[channels];
    memset(sums, 0, sizeof sums);
    memset(squares, 0, sizeof squares);
    for (long start = 0; start < pixels; start += 16) // runs of 16 pixels are summed in single precision
      for (long c = 0; c < channels; c += 8) {
        vec sum = {0}, square = {0};
        for (long pixel = start; pixel < pixels && pixel < start + 16; pixel++) {
          vec value = LOAD(from + pixel * channels + c);
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
      for (long c = group * size; c < (group + 1) * size; c++) {
        a[c] = (float)(scale * weight[c]);
        b[c] = (float)(bias[c] - mean * scale * weight[c]);
      }
    }
    for (long pixel = 0; pixel < pixels; pixel++)
      for (long c = 0; c < channels; c += 8) {
        vec value = LOAD(from + pixel * channels + c) * LOAD(a + c) + LOAD(b + c);
        STORE(to + pixel * channels + c, value / (1 + exponential(-value)));
      }
  }
}
