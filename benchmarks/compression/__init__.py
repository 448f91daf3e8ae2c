"""Gradient compression: how fast codecs are, and what they save where the network is the limit."""
