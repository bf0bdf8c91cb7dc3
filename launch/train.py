"""What `deepspeed` and `torchrun` start: exactly `vlscale train`, on every rank.

deepspeed launch/train.py CONFIG --out DIR [--resume] [key=value ...]
torchrun --nproc-per-node 8 launch/train.py CONFIG --out DIR
"""

import sys

from vlscale.cli import main

if __name__ == "__main__":
    main(["train", *(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))])
