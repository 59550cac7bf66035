"""Train an adapter or a router: python train.py fit --config configs/<name>.yaml"""

from molora.training.cli import main

if __name__ == "__main__":
    main()
