"""Gradient compression: codecs, and what each worker still owes.

Third parties add codecs with ``register``.
"""

from __future__ import annotations

from .codec import Codec as Codec
from .codec import Floats as Floats
from .codec import Words as Words
from .codec import add_residual as add_residual
from .codec import names as names
from .codec import parse as parse
from .codec import register as register
from .compressor import Compressor as Compressor
from .compressor import Owed as Owed
from .compressor import Sending as Sending
from .compressor import Source as Source
from .compressor import owed_by as owed_by
from .gradients import COMPRESSED_DTYPES as COMPRESSED_DTYPES
from .gradients import PlainGradients as PlainGradients
from .halves import BFloat16, Float16
from .int8 import Int8
from .layout import SumMemory as SumMemory
from .layout import WordsLayout as WordsLayout
from .layout import decoded as decoded
from .layout import words_layout as words_layout
from .one_bit import OneBit
from .powersgd import PowerSGD
from .topk import TopK
from .traffic import Traffic as Traffic
from .two_bits import TwoBit

for _codec in (BFloat16, Float16, Int8, OneBit, PowerSGD, TopK, TwoBit):
    register(_codec.name, _codec)
