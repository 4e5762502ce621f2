"""Tokens in, features out: the encoder and the predictor, which see no decision."""
