"""`python -m pretrain` is `pretrain`: what launchers start, which name a module."""

from pretrain.cli import main

if __name__ == "__main__":
    main()
