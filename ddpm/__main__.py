"""`python -m ddpm`, which torchrun can start: torchrun ... -m ddpm train SCHEDULE."""

from ddpm.cli import main

main()
