-- Creates Prefect's database. The PostgreSQL image itself creates MLflow's database.
CREATE DATABASE prefect;
