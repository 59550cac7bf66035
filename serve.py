"""python serve.py --bank banks/smollm2-demo --port 8000"""

import sys

from molora.serving.cli import main

if __name__ == "__main__":
    sys.exit(main())
