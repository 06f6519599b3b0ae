"""Measures our code and its alternatives on the same work. Results: bench/results; page: docs/speed.md.

These commands run the GPU rows on a machine without a package index. The GPU machine needs torch, torchvision, scipy,
safetensors and huggingface-hub.

    # here, after `python -m bench.cifar10 pack`; downloads the other packages (9.7 MiB) into .cifar10/wheels:
    make wheels FOR=3.12

    # on the GPU machine, after `python -m bench.cifar10 unpack`:
    python3 -m pip install --no-index --no-deps --target /tmp/cifar10/peers .cifar10/wheels/*.whl
    PYTHONPATH=/tmp/cifar10/peers python3 -m bench --device cuda train ddim ancestral fid_sets statistics growth
    cp bench/results/*-cuda.json OUT
"""
