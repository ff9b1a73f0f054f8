"""From a trained model to text: sampling rules and KV-cached decoding."""
