"""What pyproject.toml cannot say: find the sub-packages of folders that are mapped to another import name."""

from setuptools import find_packages, setup

FOLDERS = {"latent_critic.engine": "engine", "latent_critic.kernels": "kernels"}

setup(
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in (name, *(f"{name}.{found}" for found in find_packages(folder)))
    ]
)
