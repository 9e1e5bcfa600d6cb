"""A module wandb that keeps what it is told: in `began`, `logged` and `ended`."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any


def wandb_stand_in(monkeypatch) -> Any:
    """Put it in the place of wandb. It fails where `fails` is set."""
    module: Any = ModuleType("wandb")
    run = SimpleNamespace(step=0, url="https://wandb.ai/x", dir="here/files", offline=False)
    module.began, module.logged, module.ended, module.fails = [], [], [], False

    def log(values, step=None):
        if module.fails:
            raise RuntimeError("the service\nis gone")
        run.step = run.step if step is None else step
        module.logged.append((step, values))

    run.log, run.finish = log, lambda: module.ended.append(run.step)
    module.Settings = lambda **settings: settings
    module.Table = lambda columns, data: (columns, data)
    module.Image = str

    def init(**given):
        module.began.append(given)
        if module.fails:
            raise TimeoutError("no answer")
        return run

    module.init, module.run = init, run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module
