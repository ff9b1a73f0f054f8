"""A model by its name: found, checked, loaded, and used."""
