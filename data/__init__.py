"""Rows: what stages train on, how they are read and checked, and how they become token ids; no torch, no stage."""
