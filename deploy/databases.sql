-- PostgreSQL makes the database of MLflow by itself; Prefect has one of its own.
CREATE DATABASE prefect;
