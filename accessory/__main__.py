"""``python -m accessory``, which torchrun starts on every rank."""

import os
import sys

from accessory.cli import main

code = main()
if "RANK" in os.environ:
    # Gloo's threads may outlive the groups they served and abort a Python that is shutting down (PyTorch's issue
    # 190489); everything is done and said by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
