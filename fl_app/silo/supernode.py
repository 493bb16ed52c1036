"""python -m fl_app.silo.supernode [flower-supernode's options]: Flower's SuperNode, with short waits."""

from fl_app.flower_internals import run_quick_supernode

if __name__ == "__main__":
    run_quick_supernode()
