"""Adapters for the families of timm, torchvision and Hugging Face models, and a generic one.

`hetkd` finds them through the entry-point group ``hetkd.adapters``, as it would find anyone else's.
"""
