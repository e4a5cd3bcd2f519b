"""A shrunk model whose products run in the forms of its plan, where torch runs it on a GPU.

The model keeps its float weights and says which layer is to become what; on the device, in its precision,
each of these layers becomes the product that `export.backends.torch_kernels` has for its form.
"""

import copy
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from compress.core.fakequant import Quantized
from compress.errors import CompressError
from compress.export.backends import torch_kernels
from compress.ir import Option, Site
from compress.sites.modeling import owner
from compress.sites.prune import Removal, readers


class KernelPlaceholder(nn.Linear):
    """A linear layer that is to run in a form; until it is settled it is any other one of its weights."""

    def __init__(
        self, layer: nn.Linear, option: Option, factors: tuple[Tensor, Tensor] | None, codes: Quantized | None
    ) -> None:
        """Take over the weights of `layer`; factors or codes are what its weight was made of."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.option, self.codes, self.factors = option, codes, factors

    def product(self) -> nn.Module:
        """The layer in its form, where its weight lies.

        Raises:
            CompressError: the device has no such product, or the weight is not as the form wants it.
        """
        weights = self.factors if self.codes is None else self.codes
        return torch_kernels.required_kernel(self.option.form).deploy(weights, self)


def with_placeholders(model: nn.Module, sites: Iterable[Site], removals: Mapping[str, Removal]) -> nn.Module:
    """A copy of a shrunk model whose products say in which form they are to run.

    Args:
        model: shrunk by the same removals.
        sites: those of the original model.
        removals: by site name; those without a form change nothing.
    """
    found = copy.deepcopy(model)
    for site in sites:
        removal = removals.get(site.name)
        if removal is None or removal.form == "dense" or not len(removal.kept):
            continue
        for name in (site.writer, *readers(site)):
            layer = found.get_submodule(owner(name))
            if not isinstance(layer, nn.Linear):
                raise CompressError(
                    f"{name} lies in a {type(layer).__name__}; only an nn.Linear runs as "
                    f"{removal.form} in torch"
                )
            parts = removal.factors.get(name), removal.codes.get(name)
            found.set_submodule(owner(name), KernelPlaceholder(layer, Option.of(removal.form, None), *parts))
    return found


def deploy_kernels(model: nn.Module) -> nn.Module:
    """The model itself, every layer that says so run in its form from now on.

    Args:
        model: on its device and in its precision.

    Raises:
        CompressError: the device has no product of a form.
    """
    waiting = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, KernelPlaceholder)]
    for name, layer in waiting:
        model.set_submodule(name, layer.product())
    return model
