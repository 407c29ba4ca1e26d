"""The parts of `headline.py`: a whole model in 8 bits, the systems that run it, and what is measured."""
