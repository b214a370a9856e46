"""Losses that bring pictures and the texts that fit them together: contrastive (ITC) and by matching (ITM).

ALBEF (Li et al. 2021, arXiv 2107.07651, section 3.2); X-VLM (Zeng et al. 2022, arXiv 2111.08276, section 3.3).

Shape suffixes: B pairs of this rank's batch, M candidates, D width of the common space.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_kt.nn.losses.contrast import gathered
from hetero_kt.nn.losses.precision import wide


def itc(
    image_BD: Tensor, text_BD: Tensor, groups_B: Tensor, temperature: Tensor | float, gather: bool = True
) -> Tensor:
    """Every picture has to find its texts among all, and every text its pictures; the mean of both, in nats:

        - 1/2B sum_i sum_j y_ij (log softmax_j (v_i . t_j / T) + log softmax_j (t_i . v_j / T))

    y_i is uniform over the pairs j that show the same picture as pair i, so that another caption of a picture is not
    taken for a wrong one. Computed in float32 at least, also under autocast.

    Args:
        image_BD: pictures, of unit length.
        text_BD: texts, of unit length.
        groups_B: which picture each pair shows, int64.
        temperature: T, a scalar, or of one element.
        gather: the candidates are those of all ranks, which have the same number of rows each. The mean over ranks
            of the losses is then that of one process with all rows, and so are the parameters' gradients, once they
            have been averaged over ranks. Collective, in the forward and in the backward.
    """
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, text_BD = wide(image_BD), wide(text_BD)
        image_MD, text_MD, groups_M = image_BD, text_BD, groups_B
        if gather:
            image_MD, text_MD = gathered(torch.cat([image_BD, text_BD], 1)).chunk(2, 1)
            groups_M = gathered(groups_B)
        same_BM = (groups_B[:, None] == groups_M).to(image_BD.dtype)
        target_BM = same_BM / same_BM.sum(1, keepdim=True)
        to_text = F.cross_entropy(image_BD @ text_MD.T / temperature, target_BM)
        to_image = F.cross_entropy(text_BD @ image_MD.T / temperature, target_BM)
        return (to_text + to_image) / 2


def itm(match: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of "fits" (class 1) or "does not" (class 0), a scalar in nats, in float32 at least.

    Args:
        match: logits (3B, 2), the B pairs that fit in front of the 2B that do not.
        counted: (3B,), bool: which pairs the mean is of; all if None. The host does not wait for it.
    """
    fits = torch.arange(len(match), device=match.device) < len(match) // 3
    if counted is None:
        return F.cross_entropy(wide(match), fits.long())
    entropy = F.cross_entropy(wide(match), fits.long(), reduction="none")
    return torch.where(counted, entropy, 0.0).sum() / counted.sum()


@torch.no_grad()
def hard_negatives(
    image_BD: Tensor,
    text_BD: Tensor,
    groups_B: Tensor,
    temperature: Tensor | float,
    candidates: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A picture that does not fit each text, and a text that does not fit each picture: two (B,), int64, places among
    the candidates; and which rows have them, (B,), bool.

    Drawn from the softmax of the similarities over temperature (ITC's own), restricted to candidates of other
    pictures: what looks alike is drawn often. The random numbers are the global generator's on the features' device,
    so they are restored with it; the host does not wait for the result.

    Where all candidates show the row's own picture there is no negative, and the places are 0, whose pair fits: leave
    it out. A batch with a single candidate is refused; in a larger one this takes one picture's captions only.

    Args:
        temperature: as `itc`'s.
        candidates: pictures (M, D), texts (M, D) and groups (M,) to draw from, `gathered` ones for example; None
            draws from the batch itself.

    Raises:
        ValueError: there is one candidate only.
    """
    image_MD, text_MD, groups_M = candidates or (image_BD, text_BD, groups_B)
    if len(groups_M) < 2:
        raise ValueError(
            "hard negatives need two pictures in a rank's batch, not one: raise the batch or its part that a rank "
            "takes at once, or take --models.NAME.xvlm.negatives gathered on several ranks"
        )
    with torch.autocast(image_BD.device.type, enabled=False):
        same_BM = groups_B[:, None] == groups_M
        image_B = _drawn(wide(text_BD) @ wide(image_MD).T / temperature, same_BM)
        text_B = _drawn(wide(image_BD) @ wide(text_MD).T / temperature, same_BM)
    return image_B, text_B, ~same_BM.all(1)


def _drawn(logits_BM: Tensor, barred_BM: Tensor) -> Tensor:
    """One of each row from its softmax, (B,): the largest after Gumbel noise. torch.multinomial, which does the same,
    looks at its input on the host."""
    waiting_BM = torch.empty_like(logits_BM).exponential_().clamp_min(torch.finfo(logits_BM.dtype).tiny)
    return (logits_BM - waiting_BM.log()).masked_fill(barred_BM, -torch.inf).argmax(1)
