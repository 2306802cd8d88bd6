"""Monarch matrices for tdkit."""
