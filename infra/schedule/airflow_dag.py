"""For Airflow's folder of DAGs: one task that sends a run and waits. The pipeline's own steps are DVC's business."""

from datetime import UTC, datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    dag_id="darkmatter_nightly",
    schedule="0 1 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
):
    BashOperator(
        task_id="run",
        # A status of 3 is an answer, that the gate refused the model, and no fault: the task is skipped, not failed.
        bash_command="/opt/source/infra/schedule/submit.sh ",  # the last blank keeps Airflow from reading it as a template
        skip_on_exit_code=3,
        env={
            "PYTHON": "/opt/darkmatter/bin/python",
            "REPOSITORY": "https://git.example.com/team/darkmatter.git",
            "PLACE": "infra/places/gpu.yaml",
            "RAY_API_SERVER_ADDRESS": "{{ var.value.ray_api_server_address }}",
            "RAY_AUTH_TOKEN": "{{ conn.ray.password }}",  # a connection, which Airflow encrypts and masks in logs
        },
        append_env=True,
        retries=1,
        execution_timeout=timedelta(hours=23),
    )
