"""Measures our code and its alternatives on the same work. Results: bench/results; page: docs/speed.md.

These commands run the GPU rows on a machine without a package index. It needs torch, torchvision, scipy, safetensors and
huggingface-hub.

    make wheels FOR=3.12     # here, after `python -m bench.cifar10 pack`: the other packages, into .cifar10/wheels, 9.7 MiB

    # on the GPU machine, after `python -m bench.cifar10 unpack`:
    python3 -m pip install --no-index --no-deps --target /tmp/cifar10/peers .cifar10/wheels/*.whl
    PYTHONPATH=/tmp/cifar10/peers python3 -m bench --device cuda train ddim ancestral fid_sets statistics growth
    cp bench/results/*-cuda.json OUT
"""
