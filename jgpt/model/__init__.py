"""The GPT as a Flax module, and the functions that it is made of."""
