"""``python -m rlhf``: what ``accelerate launch -m rlhf`` starts on every rank."""

from rlhf.cli import main

if __name__ == "__main__":
    main()
