"""`check`'s work on files, which a file named deadly.* ends as a crash of a decoder does."""

import os
import signal

from fastssl import check_image
from fastssl.check_image import Looked, Piece


def look(piece: Piece) -> Looked:
    if any(b"deadly" in name for name in piece.names):
        os.kill(os.getpid(), signal.SIGKILL)
    return check_image.look(piece)
