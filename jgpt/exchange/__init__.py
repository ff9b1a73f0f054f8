"""Models of others, in and out: Hugging Face model directories."""
