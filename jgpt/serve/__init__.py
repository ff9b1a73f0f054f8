"""A chat page and an OpenAI-compatible endpoint for a model, decoding what comes together in one batch."""
