"""``python -m dllm_engine``: the command ``dllm-engine``."""

import sys

from dllm_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
