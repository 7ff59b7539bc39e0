"""`python -m tdm_serve.cli`, the same as the console script."""

import sys

from tdm_serve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
