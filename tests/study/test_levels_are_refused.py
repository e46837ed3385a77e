"""A level that no part can set is refused, not ignored."""

from __future__ import annotations

import pytest

from saelab.errors import SettingError
from saelab.sae import SAEConfig


def test_a_level_that_no_part_sets_is_refused() -> None:
    dense = SAEConfig().patched({"losses": ["reconstruction"], "controllers": []})
    assert not dense.decides_l0
    with pytest.raises(SettingError, match="level = 8.*no part of these settings sets or finds"):
        dense.at_l0(8)
    topk = dense.patched({"activation": {"kind": "topk", "k": 4}})
    assert topk.at_l0(8).target_l0 == 8
