"""A run before it: the command ``lit-stepwise plan``."""
