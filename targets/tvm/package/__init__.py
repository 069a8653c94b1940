"""An integer network as a Relax module of TVM: `show`, `run` and `object` are the commands of this package."""
