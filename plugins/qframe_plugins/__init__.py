"""The default plugins of qframe. They use only what qframe exports, like any third party."""
