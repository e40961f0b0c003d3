"""``python -m accessory``, which torchrun starts on every rank."""

import sys

from accessory.cli import main

sys.exit(main())
