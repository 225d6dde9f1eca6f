"""fork after parallel work: the threads of torch are gone in the child, and it waits for them.

    from recgrela_ext.forking import one_thread_in_children
    one_thread_in_children()            # once, before the fork

Plain torch hangs too: its OpenMP library does not survive a fork of a process that has used it.
"spawn" and "forkserver" need nothing of this, nor do the workers of a DataLoader, which torch
itself limits to one thread.
"""

from __future__ import annotations

import os

import torch

_registered = False


def one_thread_in_children() -> None:
    """From now on a forked child computes on one thread, which works, instead of hanging.

    Of the whole process, and for good; more calls change nothing. Does nothing where there is no
    fork (Windows).
    """
    global _registered
    if _registered or not hasattr(os, "register_at_fork"):
        return
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    _registered = True
