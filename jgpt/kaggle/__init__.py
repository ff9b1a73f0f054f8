"""What only Kaggle has."""
