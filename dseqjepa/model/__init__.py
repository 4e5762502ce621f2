"""Tokens in, features out: the encoder and the predictor, which make no decisions."""
