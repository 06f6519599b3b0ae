-- Creates the database of Prefect. The PostgreSQL image creates the database of MLflow itself.
CREATE DATABASE prefect;
