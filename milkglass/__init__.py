"""milkglass: train and serve deep networks across organizations without showing the data, and measure what is shown.

The public names stand in `__init__.pyi` and nowhere else; each is imported when it is first used, so that the command
line answers before torch is loaded.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
