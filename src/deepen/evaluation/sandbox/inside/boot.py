"""Start the supervisor in a bare interpreter: `python -P -S boot.py`.

Its package's parents are stood in for by empty ones, so that nothing of deepen beyond this folder is imported
and no package beyond the standard library is needed.
"""

import os
import sys
from types import ModuleType

here = os.path.dirname(os.path.abspath(__file__))
name = "deepen.evaluation.sandbox.inside"
while name:
    package = ModuleType(name)
    package.__path__ = [here]
    sys.modules[name] = package
    here, name = os.path.dirname(here), name.rpartition(".")[0]

from deepen.evaluation.sandbox.inside.supervisor import main  # noqa: E402

if __name__ == "__main__":
    main()
