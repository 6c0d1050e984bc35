"""SFKD: wavelet sub-bands, their refinement (DS2S), and the Gaussian-filtered frequency loss (GFFL)."""
