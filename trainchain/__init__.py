"""TrainChain: fine-tune an open model on other people's GPUs, pay for the work that stands up to checking."""

__version__ = "0.7.0"
