"""Step-wise, multi-turn reinforcement learning of language-model agents inside PyTorch Lightning.

``types`` and ``interfaces`` tell the program; the rooms ``algo``, ``engines``, ``text2sql``, ``rollout`` and
``training`` hold its parts. Importing this package loads none of them.
"""
