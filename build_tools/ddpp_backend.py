"""setuptools' build backend, which also asks for torch and cmake where the machine lacks them."""

from __future__ import annotations

from typing import Any

import ddpp_buildenv as env
import setuptools
from setuptools import build_meta as _base
from setuptools.build_meta import *  # noqa: F403

env.check_setuptools(setuptools.__version__)


def _missing() -> list[str]:
    if not env.want_extension():
        return []
    needs = []
    if env.torch_include() is None:
        needs.append("torch>={}.{}".format(*env.MIN_TORCH))
    if env.cmake() is None:
        needs.append("cmake>={}.{}".format(*env.MIN_CMAKE))
    return needs


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*_base.get_requires_for_build_wheel(config_settings), *_missing()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*_base.get_requires_for_build_editable(config_settings), *_missing()]
