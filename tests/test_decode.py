"""``lla_decode`` by XLA and by the reference: every way of hiding keys, dtypes, arguments, transforms, devices."""

from __future__ import annotations

from tests.decode_tests import DecodeTests


class TestXla(DecodeTests):
    implementation = "xla"


class TestXlaInFloat64(DecodeTests):
    implementation = "xla"
    dtype = "float64"


class TestReference(DecodeTests):
    implementation = "reference"
    dtype = "float64"
