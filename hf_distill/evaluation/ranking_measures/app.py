"""The page of the Space."""

import evaluate


if __name__ == "__main__":
    from evaluate.utils import launch_gradio_widget

    launch_gradio_widget(evaluate.load("ranking_measures.py"))
