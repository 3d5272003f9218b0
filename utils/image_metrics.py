"""Image quality metrics."""

from torch import Tensor


def psnr_ssim(y: Tensor, x: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """PSNR (dB) and SSIM between images (B, C, H, W) with values in [0, data_range], averaged over the batch."""
    # Imported here, because torchmetrics also imports scipy and transformers, which takes 5 seconds.
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    psnr = peak_signal_noise_ratio(y, x, data_range=data_range, dim=(1, 2, 3), reduction="elementwise_mean")
    if y.is_cuda:  # TF32 convolutions are too inexact for SSIM, which computes variances as E[x²] - E[x]²
        y, x = y.double(), x.double()
    return psnr, structural_similarity_index_measure(y, x, data_range=data_range)
