"""PEP 517 build backend: setuptools, and one rule about PyTorch.

The extension must be compiled against the torch of the environment that it is installed into, but pip's isolated build
hides that environment, and a torch among the static build requirements would be downloaded (gigabytes) although one is
there. `sysconfig` still names the target environment inside pip's isolated build: if torch is in it, it is put at the
end of the path, behind the build requirements; if it is not, torch becomes a build requirement.
"""

import re
import sys
import sysconfig
from importlib import metadata

from setuptools.build_meta import (  # noqa: F401  (a backend's hooks are its module's names)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

TORCH_MINIMUM = (2, 11)  # as in pyproject.toml's dependencies


def target_torch() -> str | None:
    """The site-packages folder of the target environment with a torch to build against, None if there is none."""
    paths = sysconfig.get_paths()
    for folder in dict.fromkeys([paths["platlib"], paths["purelib"]]):
        for distribution in metadata.distributions(name="torch", path=[folder]):
            version = tuple(int(part) for part in re.findall(r"\d+", distribution.version)[:2])
            # Also a look at the package: of an editable install only the metadata lie here.
            if version >= TORCH_MINIMUM and distribution.locate_file("torch/__init__.py").is_file():
                return folder
    return None


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    # setuptools' own hook runs setup.py to learn its setup_requires; there are none.
    return [] if target_torch() else ["torch>=" + ".".join(map(str, TORCH_MINIMUM))]


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


_folder = target_torch()
if _folder is not None and _folder not in sys.path:
    sys.path.append(_folder)
