"""check: refuses a wrong params.yaml before anything runs. Its output never changes, so it invalidates nothing."""

from darkmatter import console, files, params, recipe


def main() -> None:
    recipe.check(params.read())
    files.write("data/checked", "params.yaml is valid\n")


if __name__ == "__main__":
    console.run(main)
