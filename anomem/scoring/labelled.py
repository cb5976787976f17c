"""A few labelled defects: logistic regression on an image's pooled deviations, joined with the one-class score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anomem.errors import UserError
from anomem.validation import require


def pooled_deviations(deviations: Sequence[Tensor]) -> Tensor:
    """Mean of D and of abs(D) over the positions of each scale: S tensors [B, P_s, d_s] -> [B, 2·Σ d_s]."""
    return torch.cat([part for d in deviations for part in (d.mean(dim=1), d.abs().mean(dim=1))], dim=1)


class FewLabels(nn.Module):
    """Adds the log-odds of a logistic regression to the one-class score, both in units of their spread over normals.

    The regression learns what labelled defects look like; the one-class score still sees what none of them showed.

    Args:
        features: width of the pooled deviations.
        strength: of the regression's L2 penalty, 1/C; the classes weigh the same.

    Shape:
        pooled deviations [B, F] and one-class scores [B] -> [B].

    Attributes:
        mean: [F + 1] buffer, of the inputs over the training images.
        weight: [F + 1] buffer, on the inputs relative to the mean.
        one_class_spread: buffer, standard deviation of the one-class score over training normals.
        odds_spread: buffer, standard deviation of the log-odds over training normals that the regression had left out.

    Example:
        >>> labels = FewLabels(pooled.shape[1])
        >>> labels.fit(pooled, one_class, is_normal)
        >>> scores = labels(pooled_of_new, one_class_of_new)
    """

    mean: Tensor
    weight: Tensor
    bias: Tensor
    one_class_spread: Tensor
    odds_spread: Tensor

    def __init__(self, features: int, strength: float = 10.0) -> None:
        super().__init__()
        require(strength > 0, "strength", "a number > 0", strength)
        self.strength = strength
        self.register_buffer("mean", torch.zeros(features + 1))
        self.register_buffer("weight", torch.zeros(features + 1))
        self.register_buffer("bias", torch.zeros(()))
        self.register_buffer("one_class_spread", torch.ones(()))
        self.register_buffer("odds_spread", torch.ones(()))

    @torch.no_grad()
    def fit(self, pooled: Tensor, one_class: Tensor, is_normal: Tensor, seed: int = 0) -> None:
        """Fit to training images.

        Args:
            pooled: [N, F], see `pooled_deviations`.
            one_class: [N], the score that needs no labels.
            is_normal: [N] bool; at least two normals and one defect.
            seed: of the folds that give the spread of the log-odds.

        Raises:
            ArgumentError: no defect, or fewer than two normals.
            UserError: scikit-learn is not installed.
        """
        defects, normals = int((~is_normal).sum()), int(is_normal.sum())
        require(
            defects >= 1 and normals >= 2, "is_normal", "at least one defect and two normals", f"{defects}, {normals}"
        )
        inputs = torch.cat([pooled, one_class[:, None]], dim=1).detach().double().cpu()
        mean, spread = inputs.mean(dim=0), inputs.std(dim=0)
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        rows, labels = (inputs - mean) / spread, (~is_normal).cpu()
        weight, bias = self._regression(rows, labels)
        self.mean.copy_(mean)
        self.weight.copy_(weight / spread)
        self.bias.copy_(bias)
        odds = self._left_out_odds(rows, labels, seed)
        for buffer, values in ((self.odds_spread, odds), (self.one_class_spread, one_class.detach().double().cpu())):
            value = values[~labels].std()
            buffer.copy_(value if value > 0 else torch.ones_like(value))

    def _regression(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        try:
            from sklearn.linear_model import LogisticRegression
        except ModuleNotFoundError as error:
            raise UserError(
                "learning from labelled defects needs the package scikit-learn; pip install anomem[lab]"
            ) from error
        model = LogisticRegression(C=1 / self.strength, class_weight="balanced", max_iter=2000)
        model.fit(rows.numpy(), labels.numpy())
        return torch.from_numpy(model.coef_[0]), torch.tensor(float(model.intercept_[0]))

    def _left_out_odds(self, rows: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Log-odds of each image by a regression without it; with one defect alone, those of the fit itself."""
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        odds = torch.empty(len(rows), dtype=torch.float64)
        defects, normals = order[labels[order]], order[~labels[order]]
        folds = min(5, len(defects), len(normals))
        if folds < 2:
            weight, bias = self._regression(rows, labels)
            return rows @ weight + bias
        fold = torch.empty(len(rows), dtype=torch.int64)
        for group in (defects, normals):
            fold[group] = torch.arange(len(group)) % folds
        for i in range(folds):
            weight, bias = self._regression(rows[fold != i], labels[fold != i])
            odds[fold == i] = rows[fold == i] @ weight + bias
        return odds

    @torch.no_grad()
    def forward(self, pooled: Tensor, one_class: Tensor) -> Tensor:
        """Scores [B]; higher is more anomalous."""
        inputs = torch.cat([pooled, one_class[:, None]], dim=1)
        odds = (inputs - self.mean) @ self.weight + self.bias
        return odds / self.odds_spread + one_class / self.one_class_spread
