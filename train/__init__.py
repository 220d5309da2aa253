"""The slim training stack: ``python -m train.run``."""
